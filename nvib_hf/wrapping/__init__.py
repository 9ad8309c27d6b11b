"""How NVIB gets into a model of Transformers: where its attention sits, what it becomes, how all is saved."""
