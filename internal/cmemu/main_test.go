package cmemu

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }
