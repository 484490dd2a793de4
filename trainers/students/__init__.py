"""What a student is: its plan, its parameter count, and the surgery that cuts it from a teacher."""
