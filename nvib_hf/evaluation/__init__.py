"""What a trained model is worth: reconstruction, rate and distortion, samples, and a report."""
