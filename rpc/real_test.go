package rpc

import (
	"context"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

func init() {
	rigKinds = append(rigKinds, rigKind{"transport", realRig})
}

// realRig connects over the software NIC.
func realRig(t testing.TB, scfg *ServerConfig, ccfg *ClientConfig) *rig {
	return realRigConfig(t, nil, scfg, ccfg)
}

func realRigConfig(t testing.TB, tcfg *transport.Config, scfg *ServerConfig, ccfg *ClientConfig) *rig {
	a, b := transporttest.Pair(t, tcfg)
	ts := newTestServer(scfg)
	var wg sync.WaitGroup
	wg.Go(func() { _ = ts.ServeConn(context.Background(), b) })
	cl := NewClient(a, ccfg)
	t.Cleanup(func() {
		_ = cl.Close()
		_ = ts.Close()
		wg.Wait()
	})
	return &rig{ts: ts, cl: cl, cutOff: func() { b.Abort(nil) }}
}
