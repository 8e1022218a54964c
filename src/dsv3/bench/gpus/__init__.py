"""`dsv3 bench train --gpus N`: what is measured on several GPUs at once, each part a file."""
