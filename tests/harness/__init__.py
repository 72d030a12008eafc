"""What tests share: servers, flows as processes, workloads with their oracle, faults, and cases as data."""
