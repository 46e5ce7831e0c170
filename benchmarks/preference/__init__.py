"""Preference tuning: does a reference that knots move pay, and what does a step cost?"""
