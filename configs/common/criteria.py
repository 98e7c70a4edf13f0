"""Criteria for model.head.criterion with the weights that their authors published.

Chosen by an override, so that a run with a baseline differs from a DFD run by the criterion alone:

    model.head.criterion='${criteria.pkd}' criteria.pkd.weight=3

The published weights are for COCO, full-size FPN detectors and equal weights of levels: set
model.head.level_weights=equal to have them as published. MGD and FGD are sums, so theirs also
depend on resolution and channels. Sources: each criterion's docstring; mimic's weights are those of
FreeKD's repository (Gumpest/FreeKD), G2SD's is for ViTDet Mask R-CNN; those of RepPoints and YOLOX
are of the repositories of FGD, MGD and (PKD) mmrazor.
"""

from detectron2.config import LazyCall as L

from dfd.losses import CWDLoss, DFDLoss, FGDLoss, G2SDLoss, MGDLoss, MimicLoss, PKDLoss

faster_rcnn = dict(
    dfd=L(DFDLoss)(),
    mimic=L(MimicLoss)(weight=2.0),
    cwd=L(CWDLoss)(tau=1.0, weight=10.0),
    pkd=L(PKDLoss)(weight=6.0),
    mgd=L(MGDLoss)(alpha_mgd=5e-7, lambda_mgd=0.45),
    fgd=L(FGDLoss)(temp=0.5, alpha_fgd=5e-5, beta_fgd=2.5e-5, gamma_fgd=5e-5, lambda_fgd=5e-7),
    g2sd=L(G2SDLoss)(weight=1e-3),  # Set model.head.adapter=conv3x3 and warmup_iters=500 too.
)
mask_rcnn = faster_rcnn

retinanet = dict(
    dfd=L(DFDLoss)(),
    mimic=L(MimicLoss)(weight=5.0),
    cwd=L(CWDLoss)(tau=1.0, weight=10.0),
    pkd=L(PKDLoss)(weight=10.0),
    mgd=L(MGDLoss)(alpha_mgd=2e-5, lambda_mgd=0.65),
    fgd=L(FGDLoss)(temp=0.5, alpha_fgd=1e-3, beta_fgd=5e-4, gamma_fgd=5e-4, lambda_fgd=5e-6),
    g2sd=faster_rcnn["g2sd"],  # Published for Mask R-CNN alone.
)

# FGD alone was published for FCOS; the others are RetinaNet's.
fcos = dict(
    retinanet,
    fgd=L(FGDLoss)(temp=0.8, alpha_fgd=1.6e-3, beta_fgd=8e-4, gamma_fgd=8e-4, lambda_fgd=8e-6),
)

# As published, FGD and MGD take the pyramid before its GroupNorm, here it is after it; PKD is not
# on p7: model.head.levels=[p3,p4,p5,p6]. Mimic and CWD are RetinaNet's.
reppoints = dict(
    retinanet,
    fgd=L(FGDLoss)(temp=0.5, alpha_fgd=1.6e-3, beta_fgd=8e-4, gamma_fgd=8e-4, lambda_fgd=8e-6),
)

# FGD alone was published for YOLOX, after the stems: model.head.stems=True. The others are
# RetinaNet's.
yolox = dict(
    retinanet,
    fgd=L(FGDLoss)(
        temp=0.5,
        alpha_fgd=2e-3,
        beta_fgd=1e-3,
        gamma_fgd=1e-3,
        lambda_fgd=1e-5,
        reference_size=640,
    ),
)
