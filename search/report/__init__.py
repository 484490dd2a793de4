"""What a sweep found, told to a person: one page, its figures, and the plan as a picture."""
