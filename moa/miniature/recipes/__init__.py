"""How each of the miniature's models is trained: one module a model, one function a training."""
