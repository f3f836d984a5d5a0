"""A module of a user's that ends whoever imports it."""

import sys

sys.exit(5)
