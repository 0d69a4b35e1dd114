"""The networks: STDiT, and a U-Net for comparison."""
