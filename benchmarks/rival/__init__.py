"""What a search costs against the one that a user of Ray Tune writes today."""
