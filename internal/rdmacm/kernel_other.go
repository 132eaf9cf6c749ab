//go:build !linux

package rdmacm

import (
	"errors"
	"fmt"
)

func openKernel() (kernel, error) {
	return nil, fmt.Errorf("rdma_cm: %w: only Linux has it", errors.ErrUnsupported)
}
