"""The judgement on a device's answers, its story and its files."""
