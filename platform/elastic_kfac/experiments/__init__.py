"""Searches and studies: spaces, trials, scoring, folders and the engine that runs them under Ray."""
