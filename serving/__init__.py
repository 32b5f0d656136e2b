"""What a trained model is on disk, the one scorer, batch scoring, and the ranking service."""
