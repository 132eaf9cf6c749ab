package transport

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) {
	poison = true // slots and buffers are overwritten when they are given back
	testutil.Main(m)
}
