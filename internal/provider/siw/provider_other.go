//go:build !linux

package siw

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds nothing: software iWARP is part of Linux.
func Provider() driver.Provider { return uverbs.Absent("siw") }
