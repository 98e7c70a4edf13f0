"""What a run does on a GPU; and on the CPU, so that the tests themselves are run anywhere."""

import os
import shutil
import subprocess
import sys

import own_toys
import pytest
import torch
import torch.distributed as dist
from coco_files import write_coco
from detectron2.utils.events import EventStorage
from forked import forked
from torch.nn.parallel import DistributedDataParallel
from toys import build, make_batch

from dfd import DFDHead, DistilledDetector, FrozenTeacher
from dfd.distill.disparity import scale_features
from dfd.distill.precision import resolve_precision
from dfd.distill.processes import same_everywhere, share_buffers
from dfd.engine import argument_parser, main
from dfd.engine.trainer import Trainer
from dfd.losses import CWDLoss, DFDLoss, FGDLoss, G2SDLoss, MGDLoss, MimicLoss, PKDLoss

pytestmark = pytest.mark.slow

CUDA = pytest.mark.cuda
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
PRECISIONS = [
    ("cpu", None),
    ("cpu", "bf16"),
    pytest.param("cuda", None, marks=CUDA),
    pytest.param("cuda", "bf16", marks=CUDA),
    pytest.param("cuda", "fp16", marks=CUDA),
]
CRITERIA = {
    "dfd": DFDLoss,
    "dfd context": lambda: DFDLoss(lenient="context", split="quantile", num_regions=3),
    "dfd level": lambda: DFDLoss(scale="level", measure="cosine", lenient="tail"),
    "mimic": MimicLoss,
    "cwd": lambda: CWDLoss(weight=10),
    "pkd": PKDLoss,
    "mgd": MGDLoss,
    "fgd": FGDLoss,
    "g2sd": G2SDLoss,
}


def masked_batch():
    """Two labelled images, of which the second is filled up on two sides."""
    batch = make_batch()
    valid = torch.ones(batch[1]["image"].shape[-2:], dtype=torch.bool)
    valid[64:] = valid[:, :8] = False
    batch[1]["valid"] = valid
    return batch


def distilled(criterion=DFDLoss, precision="auto", **head):
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True, precision=precision)
    head = DFDHead(criterion=criterion(), adapter="conv3x3", **head)
    return DistilledDetector(student=build(), teacher=teacher, head=head)


def train(model, device, steps=3, **settings):
    """Steps on the same batch; the trainer."""
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings.setdefault("clip_grad_norm", 10.0)
    trainer = Trainer(model, [masked_batch()] * 2 * steps, optimizer, device=device, **settings)
    trainer.train(0, steps)
    assert all(p.device.type == device and p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    return trainer


@pytest.mark.parametrize(("device", "amp"), PRECISIONS)
@pytest.mark.parametrize("clip", [None, 10.0])
def test_plain_step(device, amp, clip):
    trainer = train(build(), device, amp=amp, clip_grad_norm=clip)
    values = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert values["loss_cls"] > 0 and values["grad_norm"] > 0
    assert ("grad_scale" in values) == (amp == "fp16")


@pytest.mark.parametrize(("device", "amp"), PRECISIONS)
@pytest.mark.parametrize("parts", [1, 2])
def test_distilled_step(device, amp, parts):
    precision = {None: "fp32"}.get(amp, amp)
    model = distilled(precision=precision)
    trainer = train(model, device, amp=amp, accumulation_steps=parts)
    values = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert values["dfd/ratio"] > 0 and values["loss_dfd_p2"] > 0
    teacher = model.teacher
    assert teacher.device.type == device
    if device == "cuda":
        # What a pass does not need is in host memory.
        assert not any(p.is_cuda for p in teacher.model.roi_heads.parameters())
        on_device = any(p.is_cuda for p in teacher.model.backbone.parameters())
        assert on_device == (precision == "fp32")


@pytest.mark.parametrize(("device", "amp"), PRECISIONS)
@pytest.mark.parametrize("kind", ["reppoints", "yolox"])
def test_own_detectors(kind, device, amp):
    """Trained under one of their kind, after the stems of YOLOX's head; then evaluated."""
    precision = {None: "fp32"}.get(amp, amp)
    teacher = FrozenTeacher(model=own_toys.build(kind, 1), allow_random=True, precision=precision)
    head = DFDHead(criterion=DFDLoss(), stems=kind == "yolox")
    model = DistilledDetector(student=own_toys.build(kind), teacher=teacher, head=head)
    trainer = train(model, device, amp=amp)
    values = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert values["dfd/ratio"] > 0 and values["loss_dfd_p3"] > 0
    with torch.no_grad():
        assert len(model.eval()(make_batch())) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_teachers_pass_beside_the_students(device):
    """The losses of many steps are those of one stream: no memory is read early, or too late."""
    losses = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = distilled(precision="fp32").to(device).train()
        model.overlap = overlap
        found = []
        for step in range(20 if device == "cuda" else 1):
            batch = masked_batch()
            for item in batch:  # Other features in every step, so that old ones would be noticed.
                item["image"] = item["image"].roll(3 * step, dims=-1)
            torch.manual_seed(step)
            with EventStorage(step):
                losses_now = model(batch)
            sum(losses_now.values()).backward()
            model.zero_grad()
            found.append({k: v.detach() for k, v in losses_now.items() if "dfd" in k})
        losses.append(found)
        assert (model._side is not None) == (overlap and device == "cuda")
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "device"), [("dfd", "cpu"), *(pytest.param(n, "cuda", marks=CUDA) for n in CRITERIA)]
)
def test_every_criterion(name, device):
    losses = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        model = distilled(CRITERIA[name], precision="fp32").to(where).train()
        # No batch norms: between two devices, these differ more than the losses.
        with torch.no_grad():
            pyramid = model.teacher(masked_batch(), input_format="BGR", device=where)
            own = {k: (v * 0.9 + 0.1).detach() for k, v in pyramid.items()}
        own = {k: v.requires_grad_() for k, v in own.items()}
        objectness = model.teacher.objectness(pyramid) if model.head.needs_objectness else None
        boxes = [item["instances"].gt_boxes.tensor for item in masked_batch()]
        found = model.head(
            own, pyramid, [(64, 96), (80, 64)], boxes, objectness=objectness,
            masks=[None, masked_batch()[1]["valid"]],
        )  # fmt: skip
        sum(found.values()).backward()
        assert all(v.grad is not None and v.grad.isfinite().all() for v in own.values())
        losses.append({k: v.detach().cpu() for k, v in found.items()})
    if name != "mgd":  # Which draws from the device's own generator.
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_loss_is_named_behind_its_backward(device):
    model = distilled()
    model.head.criteria["p4"].register_forward_hook(lambda *args: args[2] * float("inf"))
    with pytest.raises(Exception, match="loss_dfd_p4 .*level p4.* is inf at iteration 0"):
        train(model, device)


@pytest.mark.parametrize("device", DEVICES)
def test_detections_of_the_teacher_and_then_a_pass(device):
    precision = "auto" if device == "cpu" else "bf16"
    teacher = FrozenTeacher(model=build(seed=1), allow_random=True, precision=precision)
    batch = masked_batch()
    first = teacher(batch, input_format="BGR", device=device)
    assert len(teacher.detect(batch, input_format="BGR", device=device)) == 2
    second = teacher(batch, input_format="BGR", device=device)
    for name, features in first.items():
        assert features.device.type == device
        torch.testing.assert_close(second[name], features)
    if device == "cuda":
        assert not any(p.is_cuda for p in teacher.model.parameters())


@CUDA
def test_the_device_tells_whether_it_has_bf16_units():
    expected = torch.cuda.get_device_capability()[0] >= 8
    precision = resolve_precision("auto", torch.device("cuda"))
    assert precision == (torch.bfloat16 if expected else torch.float32)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """For a distilled run of four iterations, without device and folder."""
    folder = tmp_path_factory.mktemp("coco")
    train = [f"dataloader.train.{o}" for o in write_coco(folder, "train", 4)]
    test = [f"dataloader.test.{o}" for o in write_coco(folder, "val", 2, seed=1)]
    config = ["--config-file", "tests/engine/configs/dfd.py", *train, *test]
    return [*config, "model.teacher.allow_random=True", "optimizer.lr=1e-5"]


@pytest.mark.parametrize("device", DEVICES)
def test_resumed_run_ends_as_it_would_have(device, arguments, tmp_path):
    folder, resumed = tmp_path / "run", tmp_path / "resumed"

    def run(folder, *flags):
        settings = [f"train.device={device}", f"train.output_dir={folder}"]
        main(argument_parser().parse_args([*flags, *arguments, *settings]))
        return torch.load(folder / "model_final.pth", weights_only=True)["model"]

    expected = run(folder)
    shutil.copytree(folder, resumed)
    for name in ("model_0000003.pth", "model_final.pth", "summary.json"):
        os.remove(resumed / name)
    for name, value in run(resumed, "--resume").items():
        # On CUDA, not to the bit.
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)
    assert len(open(resumed / "metrics.json").readlines()) >= 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda(2))])
def test_two_processes(device, arguments, tmp_path):
    """By nccl on CUDA, by gloo on the CPU."""
    settings = [f"train.device={device}", f"train.output_dir={tmp_path}", "train.max_iter=2"]
    settings += ["model.head.criterion.sync_statistics=True"]
    if device == "cpu":
        result = forked(arguments[1], "--num-gpus=2", *arguments[2:], *settings)
    else:
        path = os.pathsep.join(filter(None, ["tests", os.environ.get("PYTHONPATH")]))
        result = subprocess.run(
            [sys.executable, "train_net.py", "--num-gpus", "2", *arguments, *settings],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"model_final.pth", "log.txt.rank1"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("device", DEVICES)
def test_group_of_one_process(device, tmp_path):
    """What the machine's one GPU can show of nccl."""
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        model = distilled(lambda: DFDLoss(sync_statistics=True)).to(device)
        ids = [torch.cuda.current_device()] if device == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        trainer = train(wrapped, device, accumulation_steps=2)
        assert trainer.storage.latest()["dfd/ratio"][0] > 0
        assert same_everywhere(model.state_dict(), model.teacher.model.state_dict())
        share_buffers(model)
        features = torch.randn(2, 4, 5, 6, device=device)
        for scaled in scale_features(features, features, None, "channel", sync=True):
            assert scaled.isfinite().all()
    finally:
        dist.destroy_process_group()
