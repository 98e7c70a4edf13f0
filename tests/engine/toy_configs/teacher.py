from toys import faster_rcnn_config

model = faster_rcnn_config(channels=12)
model.roi_heads.num_classes = "auto"
