"""Explain what an optimiser did to the weights of a graph, exactly, without knowing the optimiser.

The weights are numbered element by element, the numbers coded as values, the graph optimised with those values as its
weights, and the result decoded: where every element of every tensor came from. What was found is a recipe, proved bit
for bit on fresh random weights.
"""
