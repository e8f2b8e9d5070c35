"""What the denoising network is, and what it is asked to predict: all one needs to use a trained model."""
