package uverbs

import "github.com/ringside-rdma/ringside/internal/nldev"

// A Device is an RDMA device as the kernel describes it, before it is opened.
type Device = nldev.Device
