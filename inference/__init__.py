"""Using a trained model: prediction on videos, evaluation and pictures. Importing this package loads nothing heavy."""
