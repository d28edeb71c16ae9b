"""Retrieval: exact nearest neighbours, k-means and memory banks. The only package that imports faiss."""
