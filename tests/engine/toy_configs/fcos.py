from toys import dense_config

model = dense_config("fcos")
model.num_classes = "auto"
