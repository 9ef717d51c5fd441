"""What detectors need that find phrases: text models, data, modalities, the pointing game."""
