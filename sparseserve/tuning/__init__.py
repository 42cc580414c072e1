"""From measurements to the policy to serve: what each policy costs in quality and gives in speed."""
