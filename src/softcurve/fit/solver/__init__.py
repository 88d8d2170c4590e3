"""The second-order solver of a softmax head.

``coordinates`` turns the features into the axes of their covariance; ``objective`` is the loss and its gradient in
float64; ``curvature`` the products with the damped Gauss-Newton matrix, in float32; ``preconditioner`` its approximate
inverses; ``newton`` puts them together.
"""
