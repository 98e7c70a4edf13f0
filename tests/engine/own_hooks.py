"""Hooks as a user writes them."""

from detectron2.engine import HookBase


class CountsSteps(HookBase):
    """Logs a multiple of the loss, and how many steps it has seen, which it remembers."""

    def __init__(self, factor):
        self.factor = factor
        self.steps = 0

    def after_step(self):
        self.steps += 1
        loss = self.trainer.storage.latest()["total_loss"][0]
        self.trainer.storage.put_scalars(
            scaled=self.factor * loss, steps=self.steps, smoothing_hint=False
        )

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class SeesEvaluation(HookBase):
    """Logs what the evaluation of this step has found."""

    def after_step(self):
        for name, (value, iteration) in list(self.trainer.storage.latest().items()):
            if name == "bbox/AP" and iteration == self.trainer.iter:
                self.trainer.storage.put_scalar("seen", value + 1, smoothing_hint=False)


class CannotBeMade(HookBase):
    def __init__(self):
        raise RuntimeError("no such camera")


class FailsInAStep(HookBase):
    def after_step(self):
        return 1 / (self.trainer.iter - 1)


def no_hook():
    return 3
