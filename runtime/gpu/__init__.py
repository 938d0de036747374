"""Devices that execute launch plans, and the check of every launch without one."""
