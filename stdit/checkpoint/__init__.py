"""Read published weights safely, convert them to STDiT and back, and inflate image models to video models."""
