"""Zeros inside experts: budgets, what calibration sees, one expert after the other."""
