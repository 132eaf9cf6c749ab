package perf

import (
	"context"
	"errors"
	"fmt"
)

func (r *runner) measureRPC(ctx context.Context, spec *Spec, step, steps int) (*Result, string, error) {
	return nil, "", fmt.Errorf("rpc: %w", errors.ErrUnsupported)
}

func (s *Server) testRPC(ctx context.Context, c *control, t *setup) error {
	return fmt.Errorf("rpc: %w", errors.ErrUnsupported)
}
