"""Settings of a run, named as Detectron2's own; what it does not have is marked."""

train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=90000,
    epochs=None,  # Ours: passes over the training data; overrides max_iter.
    seed=0,  # Negative: a different one each time.
    device="auto",  # Ours: cuda where there is one, else cpu.
    # Ours: so many batches of total_batch_size / accumulation_steps images make one step.
    accumulation_steps=1,
    clip_grad_norm=None,  # Ours: the largest norm of the gradient.
    amp=dict(enabled=False, dtype="bf16"),  # Ours: the dtype. On CUDA and CPU.
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=5000,
    log_period=20,
    # Ours: evaluate the teacher on the test data before iteration 0, and stop if its AP, in
    # percent, is below a bound (which implies the first).
    eval_teacher_first=False,
    min_teacher_ap=None,
    # Ours: pictures of the disparity on the first test images, in TensorBoard and in
    # <output_dir>/disparity. A period of 0 switches them off.
    disparity_images=dict(period=5000, num_images=2),
    # Ours: hooks, off unless a metric, patience, decay, period or project is set.
    best_checkpoint=dict(metric=None, mode="max"),  # "bbox/AP": writes model_best.pth.
    early_stop=dict(metric=None, mode="max", patience=None, min_delta=0.0),
    ema=dict(decay=None, warmup=None),
    val_loss=dict(period=0, num_images=None),
    wandb=dict(project=None, entity=None, name=None, mode=None),
    hooks=[],  # Ours: your own, L(MyHook)(...), of Detectron2's HookBase.
)
