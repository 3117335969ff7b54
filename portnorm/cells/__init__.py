"""Recurrent cells: the table of published variants, and one file per cell with its step and the step's vjp."""
