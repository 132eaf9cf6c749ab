// Package provider is the static table of the providers in this build.
package provider

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/internal/provider/rxe"
	"github.com/ringside-rdma/ringside/internal/provider/siw"
	"github.com/ringside-rdma/ringside/internal/provider/soft"
)

// Entry is a provider and the tier that its devices belong to.
type Entry struct {
	Tier driver.Tier
	driver.Provider
}

// Table returns the providers, best tier first.
func Table() []Entry {
	return []Entry{{driver.TierHardware, mlx5.Provider()}, {driver.TierKernelSoft, rxe.Provider()}, {driver.TierKernelSoft, siw.Provider()},
		{driver.TierSoft, soft.Provider()}}
}
