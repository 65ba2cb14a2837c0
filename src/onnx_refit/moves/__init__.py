"""Moving elements in memory by native code, if it was compiled when the package was installed.

``moves.c`` is plain C without a line of Python in it; ``library`` finds what was compiled and says what it takes. Where
there is none, everything works without it, a few times slower.
"""
