"""Small trainings that show what each task of the package learns, with committed results."""
