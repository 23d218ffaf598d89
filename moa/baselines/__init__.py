"""Every method of the comparison; importing this package registers them all in `moa.methods.METHODS`."""

from moa.baselines import fastcomposer, moa, prior, wrong_subject

__all__ = ["fastcomposer", "moa", "prior", "wrong_subject"]
