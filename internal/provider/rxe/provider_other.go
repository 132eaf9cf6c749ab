//go:build !linux

package rxe

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds nothing: software RoCE is part of Linux.
func Provider() driver.Provider { return uverbs.Absent("rxe") }
