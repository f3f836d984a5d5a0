"""People in one wait: what they are asked, who or what answers, and the form on the flow run's page."""
