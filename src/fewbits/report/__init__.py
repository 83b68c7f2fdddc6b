"""Reports of finished work."""
