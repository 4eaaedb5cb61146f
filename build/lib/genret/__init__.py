"""genret: continuous generative retrieval in JAX.

Importing the package touches no device and needs no optional dependency.
"""

__version__ = "0.1.0"
