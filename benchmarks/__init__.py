"""How accurate and how fast the layers are: the demo on real models, and the runner for single layers."""
