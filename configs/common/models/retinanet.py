"""RetinaNet with an FPN, as in Detectron2's model zoo, for 80 classes."""

from detectron2 import model_zoo


def retinanet(depth):
    """COCO-Detection/retinanet_R_<depth>_FPN, depth 50 or 101: for weights of MSRA's ResNets."""
    model = model_zoo.get_config("common/models/retinanet.py").model
    model.backbone.bottom_up.stages.depth = depth
    model.backbone.bottom_up.freeze_at = 2
    return model
