"""What the runtimes that people deploy on can hold and run, as data: one YAML file each."""

from fewbits.targets.profile import Grid, Profile, load_profile, profile_names, refusals

__all__ = ["Grid", "Profile", "load_profile", "profile_names", "refusals"]
