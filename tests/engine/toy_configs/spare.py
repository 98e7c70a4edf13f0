from toys import adapter_with_a_spare

from .dfd import model

model.head.adapter = adapter_with_a_spare
