"""Where bytes live and how they travel. Knows no layer, no policy and no schedule."""
