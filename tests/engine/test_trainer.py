"""The training loop: precision, clipping, and what it refuses to go on with."""

import copy

import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage
from steps import distilled, gradients, images, scalars
from torch import nn
from toys import build

from dfd import UserError
from dfd.engine.optim import parameter_groups
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


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_waits_for_its_device_once_and_behind_its_backward(monkeypatch, clip):
    """Or the device would be idle while Python queues it."""
    events = []

    def note(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: events.append(what) or original(*a, **k))

    for name in ("item", "tolist", "__bool__", "__float__"):
        note(torch.Tensor, name, "read")
    note(torch.Tensor, "backward", "backward")
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    note(optimizer, "step", "step")
    data = [torch.ones(2, 4)] * 2
    settings = {"accumulation_steps": 2, "clip_grad_norm": clip}
    Trainer(model, data, optimizer, device="cpu", **settings).train(0, 1)
    # What is read between is on the CPU already.
    assert events[:3] == ["backward", "backward", "read"] and events[-1] == "step"
    assert events.count("read") == 1 + len(["loss_cls", "loss_dfd_p3"])


def test_distilled_step_logs_behind_its_backward(monkeypatch):
    model, events = distilled(build()), []
    model.head.register_forward_hook(lambda *_: events.append("head"))
    backward, put = torch.Tensor.backward, EventStorage.put_scalars
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: events.append("backward") or backward(self)
    )
    monkeypatch.setattr(
        EventStorage,
        "put_scalars",
        lambda self, **k: events.append("dfd/ratio" in k) or put(self, **k),
    )
    _, trainer = gradients(model, [images(0), images(1)])
    assert [e for e in events if e] == ["head", "backward", "head", "backward", True, True]
    assert scalars(trainer)["dfd/ratio"] > 0 and not model.log.later


def test_a_bad_part_of_a_step_is_named_with_its_term():
    """Though the parts after it were good."""
    model = distilled(build())
    criterion = model.head.criteria["p3"]
    calls = []

    def spoil(module, args, loss):
        calls.append(0)
        if len(calls) == 1:
            module.stats["term_high"] = torch.tensor(float("nan"))
            return loss * float("nan")

    criterion.register_forward_hook(spoil)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=r"loss_dfd_p3 .*level p3, term high\) is nan at iteration 0"
    ):
        gradients(model, [images(0), images(1)])
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], before[name]) for name in weights)


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


@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_the_heads_gradient_does_not_shorten_the_students_step(weight):
    """By a limit for both, a weight that changes nothing else would."""
    model = distilled(build(), weight=weight)
    _, trainer = gradients(model, [images(0)], clip_grad_norm=1e-2)
    for part in (model.student, model.head):
        norm = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert norm == pytest.approx(1e-2, rel=1e-3)
    assert scalars(trainer)["grad_norm"] > 1


@pytest.mark.parametrize(("amp", "named"), [("fp16", "needs CUDA"), ("fp8", "'fp8'")])
def test_impossible_precision_is_refused(amp, named):
    with pytest.raises(UserError, match=named):
        train(Toy(), amp=amp)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_is_clipped_over_the_whole_step(parts):
    torch.manual_seed(0)
    data = torch.rand(4, 4)
    free, trainer = gradients(Toy(), list(data.chunk(parts)))
    norm = torch.stack([g.norm() for g in free.values()]).norm()
    assert scalars(trainer)["grad_norm"] == pytest.approx(norm.item())
    for limit, factor in ((norm.item() / 2, 0.5), (2 * norm.item(), 1.0)):
        clipped, trainer = gradients(Toy(), list(data.chunk(parts)), clip_grad_norm=limit)
        for name, gradient in free.items():
            torch.testing.assert_close(clipped[name], factor * gradient, rtol=1e-4, atol=0)
        # What is told is the norm before.
        assert scalars(trainer)["grad_norm"] == pytest.approx(norm.item())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_infinite_gradient_of_a_finite_loss_never_reaches_the_weights(clip):
    """As of a square root at zero. Else the next checkpoint would hold NaN."""
    model = Toy(lambda loss: (loss - loss.detach()).sqrt())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="norm is (inf|nan) at iteration 0") as error:
        train(model, clip_grad_norm=clip)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(model.state_dict(), before)


def test_bf16_trains_a_detector_and_the_heads_losses_are_fp32():
    model = distilled(build(), lenient="context")
    criterion = model.head.criteria["p3"]
    dtypes = {}

    def look(module, args, loss):
        (level,) = args
        dtypes.update(student=level.student.dtype, teacher=level.teacher.dtype, loss=loss.dtype)
        dtypes["autocast"] = torch.is_autocast_enabled("cpu")

    criterion.register_forward_hook(look)
    generator = next(m for m in criterion.modules() if isinstance(m, nn.Conv2d))
    generator.register_forward_hook(lambda m, args, y: dtypes.update(generator=y.dtype))
    model.student.backbone.register_forward_hook(
        lambda m, args, y: dtypes.update(backbone=y["p3"].dtype)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = [images(0, 1)] * 4
    Trainer(model, data, optimizer, device="cpu", amp="bf16", accumulation_steps=2).train(0, 2)
    assert dtypes.pop("backbone") == torch.bfloat16
    assert dtypes.pop("autocast") is False
    assert set(dtypes.values()) == {torch.float32}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert "head.adapters.p3.weight" in moved and "student.backbone.fpn_output3.weight" in moved


def fp16_trainer(model, iterations=3, scale=2.0**10, **kwargs):
    """A trainer that scales its losses as under fp16, which needs CUDA, in fp32 on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, [torch.ones(2, 4)] * iterations, optimizer, device="cpu", **kwargs)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return trainer


@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaled_losses_train_as_unscaled_ones(clip):
    plain, scaled = Toy(), Toy()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    data = [torch.ones(2, 4)] * 3
    one = Trainer(plain, data, optimizer, device="cpu", clip_grad_norm=clip)
    one.train(0, 3)
    two = fp16_trainer(scaled, clip_grad_norm=clip)
    two.train(0, 3)
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())
    assert scalars(two)["grad_norm"] == pytest.approx(scalars(one)["grad_norm"])
    assert scalars(two)["grad_scale"] == 2.0**11  # Grown after two good steps.


class State(HookBase):
    """Weights, the optimizer's state and the scale after each step."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        parts = (self.trainer.model.state_dict(), self.trainer.optimizer.state_dict()["state"])
        self.seen.append((*copy.deepcopy(parts), self.trainer.grad_scaler.get_scale()))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_step_of_an_overflowing_gradient_is_left_out(clip):
    calls = []
    # The second gradient is infinite, of a loss that is not.
    model = Toy(
        lambda loss: calls.append(0) or ((loss - loss.detach()).sqrt() if len(calls) == 2 else loss)
    )
    trainer = fp16_trainer(model, clip_grad_norm=clip)
    state = State()
    trainer.register_hooks([state])
    trainer.train(0, 3)
    (weights, momentum, scale), second, third = state.seen
    torch.testing.assert_close(second[0], weights)
    torch.testing.assert_close(second[1], momentum)
    assert (scale, second[2]) == (2.0**10, 2.0**9)
    assert not torch.equal(third[0]["linear.weight"], weights["linear.weight"])
    assert [i for _, i in trainer.storage.history("grad_norm").values()] == [0, 2]
    assert [s for s, _ in trainer.storage.history("grad_scale").values()] == [1024, 512, 512]


def test_training_that_leaves_out_every_step_ends():
    model = Toy(lambda loss: (loss - loss.detach()).sqrt())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="not finite at iteration 24, however small"):
        fp16_trainer(model, iterations=50).train(0, 50)
    torch.testing.assert_close(model.state_dict(), before)


def test_the_scale_goes_on_where_it_was():
    first, second = fp16_trainer(Toy()), fp16_trainer(Toy())
    first.train(0, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.grad_scaler.state_dict() == first.grad_scaler.state_dict()
    assert second.grad_scaler.get_scale() == 2.0**11
    torch.testing.assert_close(
        second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"]
    )


def test_optimizer_state_goes_to_no_other_parameter():
    """Two layers of one size, trained in the other order: torch sees no difference."""

    def trainer(*names):
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        groups = parameter_groups(model=model, base_lr=0.1, weight_decay=0.0)
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return Trainer(model, [], optimizer, device="cpu")

    saved = trainer("a", "b")
    saved.train(0, 0)
    state = saved.state_dict()
    trainer("a", "b").load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="group detector/no_decay are not those"):
        trainer("b", "a").load_state_dict(state)


class Counter(HookBase):
    """A hook that remembers something."""

    def __init__(self):
        self.steps = 0

    def after_step(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def toy_trainer():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, [torch.ones(2, 4)] * 3, optimizer, device="cpu")


def test_each_of_several_hooks_of_a_class_goes_on():
    """Detectron2 keeps the state of the first alone."""
    before, after = [[Counter(), Counter()] for _ in range(2)]
    before[1].steps = 5
    trainer, resumed = toy_trainer(), toy_trainer()
    trainer.register_hooks(before)
    trainer.train(0, 2)
    resumed.load_state_dict(trainer.state_dict())
    resumed.register_hooks(after)
    assert [hook.steps for hook in after] == [2, 7]


@pytest.mark.parametrize("there", [True, False])
def test_hooks_that_come_after_the_checkpoint_get_their_state(caplog, there):
    """A run loads its checkpoint before it has hooks."""
    before, counter = toy_trainer(), Counter()
    scheduler = torch.optim.lr_scheduler.StepLR(before.optimizer, 1)
    before.register_hooks([hooks.LRScheduler(before.optimizer, scheduler), counter])
    before.train(0, 2)
    after, resumed = toy_trainer(), Counter()
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    scheduler = torch.optim.lr_scheduler.StepLR(after.optimizer, 1)
    after.register_hooks([hooks.LRScheduler(after.optimizer, scheduler)])
    after.register_hooks([resumed] if there else [])
    assert scheduler.last_epoch == 2
    after.train(2, 3)
    assert resumed.steps == (3 if there else 0)
    lost = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert lost == ([] if there else ["--resume: this run has no hook Counter: its state is lost"])
