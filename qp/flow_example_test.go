package qp_test

import (
	"context"
	"fmt"
	"log"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Frames to UDP port 4242 of a ConnectX's port go past the kernel.
func ExampleQP_Steer() {
	fail := func(err error) {
		if err != nil {
			log.Fatal(err)
		}
	}
	dev, err := verbs.Open("mlx5_0")
	fail(err)
	defer dev.Close()
	pd, err := dev.AllocPD()
	fail(err)
	defer pd.Close()
	cq, err := dev.NewCQ(verbs.CQConfig{})
	fail(err)
	defer cq.Close()
	mem, err := mr.Alloc(pd, 1<<16, ib.AccessLocalWrite)
	fail(err)
	defer mem.Close()

	q, err := qp.New(pd, &qp.Config{Type: ib.RawPacket, SendCQ: cq})
	fail(err)
	defer q.Close()
	fail(q.ActivateRaw(context.Background(), 1))
	receive := func(i int) {
		_, err := q.PostRecv([]ib.RecvWR{{ID: uint64(i), SGEs: []ib.SGE{mem.SGE(i*2048, 2048)}}})
		fail(err)
	}
	for i := range 32 {
		receive(i)
	}
	flow, err := q.Steer(ib.FlowRule{UDP: &ib.FlowFilter[ib.FlowPorts]{Value: ib.FlowPorts{Dst: 4242}, Mask: ib.FlowPorts{Dst: 0xffff}}})
	fail(err)
	defer flow.Close()

	wcs := make([]ib.WC, 32)
	for {
		n, err := cq.Poll(wcs)
		fail(err)
		for _, wc := range wcs[:n] {
			fail(verbs.CheckWC("receive", &wc))
			frame := mem.Bytes()[wc.ID*2048:][:wc.ByteLen]
			fmt.Printf("%d bytes from %v\n", len(frame), ib.MAC(frame[6:12]))
			receive(int(wc.ID))
		}
	}
}
