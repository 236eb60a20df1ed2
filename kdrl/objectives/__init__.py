"""What is minimised: arithmetic on tensors that knows neither models nor tasks."""
