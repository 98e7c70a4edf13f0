import pytest
import torch
from detectron2.engine import hooks
from torch import nn

from dfd import UserError
from dfd.engine.trainer import Trainer


class Toy(nn.Module):
    """A linear model; its loss is what ``spoil`` makes of it."""

    def __init__(self, spoil=lambda loss: loss):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.spoil = spoil

    def forward(self, x):
        y = self.linear(x)
        self.dtype = y.dtype
        return {
            "loss_cls": y.float().square().mean(),
            "loss_dfd_p3": self.spoil(y.float().abs().mean()),
        }


def train(model, iterations=3, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.ones(2, 4)] * iterations
    Trainer(model, data, optimizer, device="cpu", **kwargs).train(0, iterations)


def test_mixed_precision_works_on_the_cpu():
    model = Toy()
    before = model.linear.weight.clone()
    train(model, amp="bf16")
    assert model.dtype == torch.bfloat16
    assert model.linear.weight.dtype == torch.float32
    assert not torch.equal(model.linear.weight, before)


def test_no_mixed_precision_by_default():
    model = Toy()
    train(model)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_term_level_and_iteration_and_keeps_the_weights(value):
    calls = []
    model = Toy(lambda loss: loss * (value if len(calls) == 1 else calls.append(0) or 1))
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.linear.weight.clone()))
    message = r"loss_dfd_p3 \(distillation, level p3\) is .* iteration 1"
    with pytest.raises(UserError, match=message):
        train(model)
    torch.testing.assert_close(model.linear.weight, seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_divergence_noticed_by_detectron2_is_one_line():
    class Diverged(Toy):
        def forward(self, x):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    with pytest.raises(UserError, match="diverged at iteration 0: Predicted boxes") as error:
        train(Diverged())
    assert "\n" not in str(error.value)


def test_failure_in_the_last_iteration_is_no_end_of_the_run():
    """Or the run would be evaluated, and under several processes by one of them alone."""
    model = Toy(lambda loss: loss * float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, [torch.ones(2, 4)], optimizer, device="cpu")
    evaluated = []
    trainer.register_hooks([hooks.EvalHook(0, lambda: evaluated.append(1))])
    with pytest.raises(UserError):
        trainer.train(0, 1)
    assert not evaluated


def test_model_left_in_eval_mode_is_noticed():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, [torch.ones(2, 4)], optimizer, device="cpu")
    model.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        trainer.train(0, 1)


@pytest.mark.parametrize(("amp", "named"), [("fp16", "needs CUDA"), ("fp8", "'fp8'")])
def test_impossible_precision_is_refused(amp, named):
    with pytest.raises(UserError, match=named):
        train(Toy(), amp=amp)
