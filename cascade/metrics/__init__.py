"""What is measured of generated clips, one file per measure."""
